"""The torch.distributed backends "shm" and "hier": who meets, over which memory, and how a failed group goes on."""
