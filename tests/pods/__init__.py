"""Training over several processes on one machine, for test_pods.py."""
