package netfilter

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"golang.org/x/sys/unix"
)

// element is what a key of a set has.
type element struct {
	value []byte
	// end is the last key of a range.
	end     []byte
	comment string
}

// snapshot is what the agent has written into the node's tables. The flows aren't
// in it: the rules write them, too.
type snapshot struct {
	generation uint32
	sets       map[string]map[string]element
	// chains that there are, by name.
	chains map[string]bool
	// flows are the sets of single tenants and accounts, by name.
	flows map[string]*nftables.Set
}

// dynamic sets are the rules' to write.
func dynamic(s *nftables.Set) bool { return s.Dynamic }

// snapshotNow reads the tables, unless nothing has changed since the last time.
func (d *Datapath) snapshotNow() (*snapshot, error) {
	c, err := open(0)
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	gen, err := generation(0)
	if err != nil {
		return nil, err
	}
	if d.snap != nil && d.snap.generation == gen {
		return d.snap, nil
	}
	if there, err := hasTable(c, steering); err != nil {
		return nil, err
	} else if !there {
		// Somebody has flushed the whole ruleset: all pods are to be steered anew.
		d.log.Warn("The nftables of the node's steering are gone; making them anew", "table", TableName)
		if err := d.install(); err != nil {
			return nil, err
		}
		if gen, err = generation(0); err != nil {
			return nil, err
		}
	}
	s := &snapshot{generation: gen, sets: map[string]map[string]element{}, chains: map[string]bool{}, flows: map[string]*nftables.Set{}}
	for name, set := range d.sets {
		if dynamic(set) {
			continue
		}
		elements, err := c.GetSetElements(set)
		if err != nil {
			return nil, fmt.Errorf("read set %s: %w", name, err)
		}
		s.sets[name] = map[string]element{}
		for _, e := range elements {
			s.sets[name][string(e.Key)] = element{value: e.Val, end: e.KeyEnd, comment: e.Comment}
		}
	}
	chains, err := c.ListChainsOfTableFamily(steering.Family)
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	for _, ch := range chains {
		if ch.Table != nil && ch.Table.Name == TableName {
			s.chains[ch.Name] = true
		}
	}
	sets, err := c.GetSets(steering)
	if err != nil {
		return nil, fmt.Errorf("list sets: %w", err)
	}
	for _, set := range sets {
		if _, ok := ofAccount(set.Name); ok || isFlowSet(set.Name) {
			s.flows[set.Name] = set
		}
	}
	d.snap = s
	d.pods.Store(directoryOf(s))
	return s, nil
}

// podVeths returns the veths of a pod.
func (s *snapshot) podVeths(uid string) (veths []uint32) {
	for k, e := range s.sets[setPods] {
		if e.comment == uid {
			veths = append(veths, binaryutil.NativeEndian.Uint32([]byte(k)))
		}
	}
	slices.Sort(veths)
	return veths
}

// podAddresses returns the addresses of veths.
func (s *snapshot) podAddresses(veths []uint32) (addresses []netip.Addr) {
	for _, f := range families {
		for k, e := range s.sets[setAddresses+f.version] {
			if slices.Contains(veths, binaryutil.NativeEndian.Uint32(e.value)) {
				a, _ := netip.AddrFromSlice([]byte(k))
				addresses = append(addresses, a)
			}
		}
	}
	return addresses
}

// tenantOf returns a pod's tenant.
func (s *snapshot) tenantOf(veth uint32) uint16 {
	e, ok := s.sets[setPods][string(native(veth))]
	if !ok {
		return 0
	}
	return uint16(binaryutil.NativeEndian.Uint32(e.value))
}

// change is a transaction on the node's tables.
type change struct {
	d    *Datapath
	snap *snapshot
	// By set and key; nil deletes.
	elements map[string]map[string]*element
	// chains to make, with their hooks, and to delete.
	chains map[string]*nftables.Chain
	rules  map[string][]rule
	gone   map[string]bool
	// leads says of chains of pods' veths whose account they lead to, also of such that are
	// there and stay, and of those of accounts which pace they keep.
	leads map[string]string
	// stateful chains stay if they are as they should be: rules that are new have forgotten
	// what was taken of a pace.
	stateful map[string]bool
	// Sets of single tenants and accounts, which chains to make need, or those that go did.
	made, unmade []*nftables.Set
}

func (d *Datapath) change() (*change, error) {
	s, err := d.snapshotNow()
	if err != nil {
		return nil, err
	}
	return &change{d: d, snap: s, elements: map[string]map[string]*element{}, chains: map[string]*nftables.Chain{}, rules: map[string][]rule{}, gone: map[string]bool{}, leads: map[string]string{}, stateful: map[string]bool{}}, nil
}

func (c *change) set(set string, k []byte, e *element) {
	if c.elements[set] == nil {
		c.elements[set] = map[string]*element{}
	}
	c.elements[set][string(k)] = e
}

func (c *change) put(set string, k, value []byte, comment string) {
	c.set(set, k, &element{value: value, comment: comment})
}

func (c *change) delete(set string, k []byte) { c.set(set, k, nil) }

// hook makes the chain of a veth.
func (c *change) hook(name string, hook *nftables.ChainHook, device string, rules ...rule) {
	c.chains[name] = &nftables.Chain{Name: name, Table: steering, Type: nftables.ChainTypeFilter, Hooknum: hook,
		Priority: nftables.ChainPriorityRef(chainPriority), Device: device}
	c.rules[name] = rules
}

// branch makes a chain that a veth's leads to.
func (c *change) branch(of chain) {
	c.chains[of.name], c.rules[of.name] = &nftables.Chain{Name: of.name, Table: steering}, of.rules
}

// chainPriority is before that of flow tables and of what others have there.
const chainPriority = -300

func (c *change) unhook(name string) { c.gone[name] = true }

// chunk keeps a message's list below 64 KiB.
const chunk = 256

// writing is what a chain that was written hangs on, "-" for one that others lead to, and
// where it leads.
type writing struct{ hook, leads string }

func (c *change) writingOf(name string) writing {
	return writing{cmp.Or(c.chains[name].Device, "-"), c.leads[name]}
}

// commit does what isn't so yet, in one step.
func (c *change) commit() error {
	conn, err := open(0)
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	changed := false
	c.closeAccounts()
	for _, name := range slices.Sorted(maps.Keys(c.elements)) {
		set, have := c.d.sets[name], c.snap.sets[name]
		var del, add []nftables.SetElement
		for k, want := range c.elements[name] {
			old, there := have[k]
			if want != nil && there && bytes.Equal(old.value, want.value) && bytes.Equal(old.end, want.end) && old.comment == want.comment {
				continue
			}
			if there {
				// The comment isn't part of the key, but with it the message is the same.
				del = append(del, nftables.SetElement{Key: []byte(k), KeyEnd: old.end})
			}
			if want != nil {
				add = append(add, nftables.SetElement{Key: []byte(k), KeyEnd: want.end, Val: want.value, Comment: want.comment})
			}
		}
		changed = changed || len(del)+len(add) > 0
		for part := range slices.Chunk(del, chunk) {
			if err := conn.SetDeleteElements(set, part); err != nil {
				return err
			}
		}
		for part := range slices.Chunk(add, chunk) {
			if err := conn.SetAddElements(set, part); err != nil {
				return err
			}
		}
	}
	for _, s := range c.made {
		if err := conn.AddSet(s, nil); err != nil {
			return err
		}
	}
	// A rule may lead to a chain that comes later.
	var missing, gone []*nftables.Chain
	written := map[string]writing{}
	for _, name := range slices.Sorted(maps.Keys(c.chains)) {
		want, have := c.writingOf(name), c.d.written[name]
		switch {
		case !c.snap.chains[name]:
			missing = append(missing, conn.AddChain(c.chains[name]))
		case have == want:
			continue
		case have.hook == want.hook:
			missing = append(missing, c.chains[name])
			conn.FlushChain(c.chains[name])
		default:
			// By a former process, which may have been another version, or of an interface
			// that has another name now: since Linux 6.16 a hook goes by the name.
			if c.stateful[name] {
				same, err := hasRules(conn, steering, []chain{{name, c.rules[name]}})
				if err != nil {
					return err
				}
				if same {
					c.d.written[name] = want
					continue
				}
			}
			missing = append(missing, c.chains[name])
			conn.FlushChain(c.chains[name])
			if c.chains[name].Device != "" {
				conn.DelChain(c.chains[name])
				conn.AddChain(c.chains[name])
			}
		}
		written[name] = want
	}
	// Of pods that are there, wherever their chains hang.
	for _, name := range slices.Sorted(maps.Keys(c.leads)) {
		have, known := c.d.written[name]
		if c.chains[name] != nil || !c.snap.chains[name] || c.gone[name] || known && have.leads == c.leads[name] {
			continue
		}
		of := &nftables.Chain{Name: name, Table: steering}
		missing = append(missing, of)
		conn.FlushChain(of)
		if known {
			written[name] = writing{have.hook, c.leads[name]}
		}
	}
	for _, of := range missing {
		for _, r := range c.rules[of.Name] {
			conn.AddRule(&nftables.Rule{Table: steering, Chain: of, Exprs: r})
		}
	}
	for name := range c.gone {
		if c.snap.chains[name] && c.chains[name] == nil {
			gone = append(gone, &nftables.Chain{Name: name, Table: steering})
		}
	}
	for _, of := range gone {
		conn.FlushChain(of)
	}
	for _, of := range gone {
		conn.DelChain(of)
	}
	for _, s := range c.unmade {
		conn.DelSet(s)
	}
	changed = changed || len(missing)+len(gone)+len(c.unmade) > 0
	if !changed {
		return nil
	}
	c.d.snap = nil
	if err := conn.Flush(); err != nil {
		if strings.Contains(err.Error(), unix.ENFILE.Error()) {
			return fmt.Errorf("a set of the table %s is full; move pods to other nodes: %w", TableName, err)
		}
		return err
	}
	maps.Copy(c.d.written, written)
	for _, of := range gone {
		delete(c.d.written, of.Name)
	}
	return nil
}
