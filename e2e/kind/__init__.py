"""Real Kubernetes clusters for the e2e tests, made on this machine by kind.

What cannot be pulled is built: Kubernetes and its companions from Go modules, the node's root file
system from Debian packages. Built things are kept in the cache directory; what a run changes on the
machine is put back by `down`.

Standard library only: the binaries are built before there is a virtual environment. Nothing in here
knows Tidegate."""
