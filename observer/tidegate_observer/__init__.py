"""What flows on a node, for people and their tools: a process of its own beside the loader.

    rings       records out of the kernel's ring buffers, whole batches at a time
    records     records → Flow: struct layouts, joined with a Directory
    directory   who has an address, what a rule set's rule is, which Service an address is of
    rundir      a Directory from a node's files, and People for who has the addresses
    people      People from a run directory's files; informer: from an API server
    flow        Flow and what it points to
    history     the last flows, and who waits for the next
    filters     a FlowFilter of the API → a function of a Flow
    expressions CEL, for filters
    messages    a Flow → the API's messages
    told        and back, for filters
    streams     calls under way, and clients that take nothing
    tls         certificates, read again
    server      the Observer and Peer services over gRPC
    client      the other side of them, for `tidegate observe` and for a relay
    relay       many observers as one; peers: which there are
    metrics, exposition    figures for Prometheus
    policylog   what policies decided, as lines
    tracked     flows whose end nobody tells
    collector   all of it together, every 50 ms
    api/        the contract: .proto files, and what is generated of them
    main, relay_main       the processes

Reads the kernel and files; decides no verdict, writes no map, and nothing depends on it: killed, it
costs no packet. May not live here: forms for a terminal (`tidegate_cli.observe`), any import of the
loader or the operator.
"""
