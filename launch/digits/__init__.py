"""The parts of `launch/quickstart.py`: handwritten digits as frames, a tiny model, the report."""
