"""Images on disk -> float32 arrays in [-1, 1] with an id and a patient; splits; order of training. Knows no model."""

from data.pipeline import batches, in_order
from data.sets import ImageSet, content, load, subset
from data.synthetic import read_folder
