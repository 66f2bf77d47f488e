"""What every run needs: options, devices, the training loop, checkpoints, records, reports."""
