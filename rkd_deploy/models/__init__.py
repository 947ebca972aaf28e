"""Networks, and what is derived from them: stage maps, cost, separation into S and A."""
