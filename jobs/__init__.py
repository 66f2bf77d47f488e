"""What `imagenet.py` does once its options are known: prune and train, evaluate a checkpoint, check pictures."""
