"""What tests/bench.py measures of whole training steps: their memory, time and FLOPs, at quick and paper sizes."""
