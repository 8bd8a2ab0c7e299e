"""The parts of `launch/finetune.py`: options, model and engine, checkpoints, export and the loop."""
