"""How long a traced step takes: the model, what it is calibrated with, what it is compared with."""
