"""The parts of `launch/finetune.py`: options, model, checkpoints, export and the loop."""
