"""Commands that look inside adapters: inspect, compare and overlap."""
