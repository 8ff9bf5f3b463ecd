"""Many processes that do one job: started by torchrun, joined by torch.distributed, applied from outside the core."""
