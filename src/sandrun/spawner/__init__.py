"""The privileged side: supervisor, spawner and zygotes, and the unprivileged end of its socket (`client`)."""
