# Everything a developer or CI runs. `make help` lists it.
SHELL := /bin/bash
CLANG := clang-19
MULTIARCH := $(shell gcc -print-multiarch 2>/dev/null)
OBJECTS := $(patsubst datapath/%.bpf.c,datapath/build/%.o,$(wildcard datapath/*.bpf.c))
HEADERS := $(wildcard datapath/include/tidegate/*.h)
BPF_CFLAGS := -O2 -g -Wall -Wextra -Werror -target bpf -mcpu=v3 -Idatapath/include $(if $(MULTIARCH),-isystem /usr/include/$(MULTIARCH))

.PHONY: objects
objects: $(OBJECTS)

datapath/build/%.o: datapath/%.bpf.c $(HEADERS)
	@mkdir -p datapath/build
	$(CLANG) $(BPF_CFLAGS) -c $< -o $@
