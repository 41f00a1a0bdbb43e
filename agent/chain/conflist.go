// Package chain puts the CNI plugin at the end of the node's plugin chain and
// keeps it there. The configuration belongs to another CNI: it is edited in
// place, byte by byte, so that taking the plugin out leaves it as it was.
package chain

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// Type is the plugin's type in a conflist and the name of its binary.
const Type = "bulkhead-cni"

// Entry is the plugin's own configuration.
type Entry struct {
	Type string `json:"type"`
	// Socket of the agent.
	Socket string `json:"socket"`
	// Membership is the file for when the agent is away.
	Membership string `json:"membership"`
	// TimeoutSeconds that a pod may wait for its steering.
	TimeoutSeconds int `json:"timeoutSeconds"`
}

// element is one plugin of a conflist: bytes [start, end) of the file.
type element struct {
	start, end int
	kind       string
}

// elements finds the plugins of a conflist.
func elements(conflist []byte) ([]element, error) {
	d := json.NewDecoder(bytes.NewReader(conflist))
	t, err := d.Token()
	if err != nil {
		return nil, fmt.Errorf("parse conflist: %w", err)
	}
	if t != json.Delim('{') {
		return nil, errors.New("parse conflist: not a JSON object")
	}
	var found []element
	seen := false
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return nil, fmt.Errorf("parse conflist: %w", err)
		}
		if key != "plugins" {
			var skip json.RawMessage
			if err := d.Decode(&skip); err != nil {
				return nil, fmt.Errorf("parse conflist: %w", err)
			}
			continue
		}
		if seen {
			return nil, errors.New(`parse conflist: "plugins" is there twice`)
		}
		seen = true
		t, err := d.Token()
		if err != nil {
			return nil, fmt.Errorf("parse conflist: %w", err)
		}
		if t != json.Delim('[') {
			return nil, errors.New(`parse conflist: "plugins" is no list`)
		}
		for d.More() {
			var raw json.RawMessage
			if err := d.Decode(&raw); err != nil {
				return nil, fmt.Errorf("parse conflist: %w", err)
			}
			end := int(d.InputOffset())
			var p struct{ Type string }
			if err := json.Unmarshal(raw, &p); err != nil {
				return nil, fmt.Errorf("parse plugin %d of conflist: %w", len(found), err)
			}
			found = append(found, element{end - len(raw), end, p.Type})
		}
		if _, err := d.Token(); err != nil {
			return nil, fmt.Errorf("parse conflist: %w", err)
		}
	}
	if _, err := d.Token(); err != nil {
		return nil, fmt.Errorf("parse conflist: %w", err)
	}
	return found, nil
}

// Chained returns the conflist with the entry as its last plugin, and the same
// bytes if it is already.
func Chained(conflist []byte, e Entry) ([]byte, error) {
	e.Type = Type
	entry, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	all, err := elements(conflist)
	if err != nil {
		return nil, err
	}
	if n := len(all); n > 1 && all[n-1].kind == Type && bytes.Equal(conflist[all[n-1].start:all[n-1].end], entry) &&
		!slices.ContainsFunc(all[:n-1], func(x element) bool { return x.kind == Type }) {
		return conflist, nil
	}
	bare, err := Unchained(conflist)
	if err != nil {
		return nil, err
	}
	if all, err = elements(bare); err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, errors.New("chain CNI plugin: the conflist has no plugin to come after")
	}
	at := all[len(all)-1].end
	return slices.Concat(bare[:at], []byte(","), entry, bare[at:]), nil
}

// Unchained returns the conflist without our plugin; what is left is
// byte-identical to what Chained was given.
func Unchained(conflist []byte) ([]byte, error) {
	all, err := elements(conflist)
	if err != nil {
		return nil, err
	}
	out := slices.Clone(conflist)
	for i := len(all) - 1; i >= 0; i-- {
		if all[i].kind != Type {
			continue
		}
		from, to := all[i].start, all[i].end
		if i > 0 {
			from = all[i-1].end // with the comma before it
		} else if len(all) > 1 {
			to = all[1].start // somebody put it first: with the comma after it
		}
		out = slices.Delete(out, from, to)
		all = slices.Delete(all, i, i+1)
	}
	return out, nil
}

// FromConf wraps a single plugin's configuration (.conf) into a conflist with
// the entry.
func FromConf(conf []byte, e Entry) ([]byte, error) {
	var head struct {
		CNIVersion string `json:"cniVersion"`
		Name       string `json:"name"`
		Type       string `json:"type"`
	}
	if err := json.Unmarshal(conf, &head); err != nil {
		return nil, fmt.Errorf("parse CNI configuration: %w", err)
	}
	if head.Name == "" || head.Type == "" {
		return nil, errors.New("parse CNI configuration: it has no name or no type")
	}
	e.Type = Type
	return json.MarshalIndent(map[string]any{
		"cniVersion": head.CNIVersion, "name": head.Name, "plugins": []any{json.RawMessage(conf), e},
	}, "", "  ")
}
