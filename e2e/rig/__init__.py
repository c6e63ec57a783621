"""What e2e tests do with a cluster: pods that answer and ask, Tidegate installed, a dump of it all.

Tests say what is expected; nothing in here does. Nothing in here imports Tidegate: what is judged
is the image in the cluster."""
