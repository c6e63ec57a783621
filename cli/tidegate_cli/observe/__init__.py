"""`tidegate observe`: flows of an observer, or of any server of Hubble's API, for people.

    arguments    the flags, which are Hubble's
    request      flags → the request that the server gets
    printer      responses → text
    command      asks, and prints as it comes

No flow is judged, joined or filtered here: the server does that.
"""
