"""The loss under the names and signatures that other code bases call; nothing here computes anything of its own."""
