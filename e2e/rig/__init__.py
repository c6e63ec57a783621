"""What e2e tests do with a cluster: pods that answer and ask, Tidegate installed, a dump of it all.

Tests say what is expected; nothing in here does. What is judged is the image in the cluster: of
Tidegate only what asks and compares is imported here."""
