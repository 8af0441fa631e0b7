"""The main job in one call: exits attached, tuned, calibrated, and measured against full depth."""
