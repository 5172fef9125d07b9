"""A job's life: who asks, what is admitted, when it runs, what is kept of it. asyncio, without privilege."""
