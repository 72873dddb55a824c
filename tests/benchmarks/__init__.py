"""What is measured. Each module is one benchmark, `measure() -> dict`; `python -m tests.benchmarks` runs them."""
