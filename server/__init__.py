"""The REST face and what a person or client touches. Uses `gpu_pool`; never imports torch, touches no process."""
