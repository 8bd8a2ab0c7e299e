"""The parts of `launch/quickstart.py`: handwritten digits as frames, a tiny mllama, the report."""
