"""What the programs do once their options are known: prune and train, evaluate, check pictures; compile and prove."""
