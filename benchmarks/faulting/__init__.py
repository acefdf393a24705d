"""The parts of `benchmarks/faults.py`: the world that runs live in, and one function a goal."""
