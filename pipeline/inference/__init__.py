"""Using what an experiment has learned: its kept models predict other images, and are tried on other sets."""
