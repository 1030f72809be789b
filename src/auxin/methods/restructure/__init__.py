"""Methods that change how a model computes and hardly how large it is."""
