"""The parts of the scripts `launch/bench_*.py`: what is measured, and what the answers mean."""
