"""The experiments of the Drop-Muon paper: presets, training, what came of it, and pictures."""
