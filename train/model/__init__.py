"""The model that is trained on, and the network that is trained."""
