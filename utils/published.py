"""What published code does beside what its paper says, where users rely on it. One table a quirk."""

# Stripe-wise pruning trains these networks from batch-norm scales of one half.
FIRST_NORM_SCALE = {"vgg16_bn": 0.5, "resnet56_projection": 0.5}

# 1xN pruning: the step policy of the learning rate decays once more from this epoch on, whatever the interval is.
EXTRA_DECAY_FROM = 80
