"""What methods make plans with: the method itself, the bench that it works at, changes of width and depth, the cutting
of units, and hooks for the training after.
"""
