"""Tasks, one file each: ``read`` gives data and model, ``TAKES`` names the settings it reads that others may not."""
