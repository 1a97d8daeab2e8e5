"""The shared score network: the frozen prior with a LoRA adapter and a camera condition, and its replay buffer."""
