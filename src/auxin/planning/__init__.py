"""What methods make plans with: the method itself, changes of width and depth, and hooks for the training after."""
