"""Text that the project owns: generators of everyday, arithmetic and contract text for the embedded models."""
