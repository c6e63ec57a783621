// SPDX-License-Identifier: Apache-2.0

// Command kstatus says what tools that read an object's status by kstatus make of it: for each JSON
// object on its standard input a line, Current, InProgress, Failed, Terminating or Unknown.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
)

func main() {
	if err := run(json.NewDecoder(os.Stdin)); err != nil {
		fmt.Fprintln(os.Stderr, "kstatus:", err)
		os.Exit(1)
	}
}

func run(objects *json.Decoder) error {
	for {
		var text json.RawMessage
		err := objects.Decode(&text)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		object := &unstructured.Unstructured{}
		if err := object.UnmarshalJSON(text); err != nil {
			return err
		}
		found, err := status.Compute(object)
		if err != nil {
			return err
		}
		fmt.Println(found.Status)
	}
}
