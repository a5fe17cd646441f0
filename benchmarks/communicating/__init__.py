"""A GPT that several workers train together, each with text of its own, sending compressed."""
