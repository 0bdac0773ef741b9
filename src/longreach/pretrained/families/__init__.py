"""One file for each family of pretrained models: how its code is made exact."""
