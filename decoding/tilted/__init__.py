"""Steering by a reward: `rewards` score texts, `tilt` holds the settings, `particles` does the work."""
