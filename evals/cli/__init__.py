"""The parts that commands share: the Hydra application, help, display, progress, and launching on clusters."""
