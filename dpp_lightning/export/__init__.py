"""Export: a trainer's checkpoint to a folder that ``from_pretrained`` loads, or to a delta."""
