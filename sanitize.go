package main

// This file cleans samples on the client and normalizes them on the server. A sample that
// ServerNormalizer.Normalize accepts has the authenticated cluster ID as a label, and its metric
// name is not one that the server uses for its own metrics. In a sample that ClientCleaner.Clean
// accepts, no label in Anonymize has its original value. The sanitize family must not know of HTTP,
// files or stores. Cleaning a sample does not depend on earlier samples.

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"hash"
	"maps"
	"slices"
	"strings"
)

// labelValue returns the value of the named label. It returns an empty value if there is no such
// label, because Prometheus treats an empty label and a missing label as the same.
func labelValue[T string | []byte](labels []Label, name T) []byte {
	for i := range labels {
		if string(labels[i].Name) == string(name) {
			return labels[i].Value
		}
	}
	return nil
}

func hasLabel[T string | []byte](labels []Label, name T) bool {
	return slices.ContainsFunc(labels, func(l Label) bool { return string(l.Name) == string(name) })
}

// Names and name prefix of the metrics that the server itself serves about each site. A site must
// not push samples with these names. Otherwise it could hide from alerts that it has stopped
// pushing, and a consumer's scrape could contain a series twice.
const (
	PushTimeName        = "push_time_seconds"
	PushFailureTimeName = "push_failure_time_seconds"
	ClusterNamePrefix   = "telemeter_cluster_"
)

// isReservedMetricName reports whether name is reserved for the metrics that the server itself
// serves about each site. It also reports true for a name that becomes such a name when it is
// escaped with underscores.
func isReservedMetricName(name []byte) bool {
	if !IsLegacy(name, nil) { // for example, push.time.seconds is escaped to push_time_seconds
		name = []byte(NegotiateEscaping("").MetricName(string(name)))
	}
	return string(name) == PushTimeName || string(name) == PushFailureTimeName ||
		bytes.HasPrefix(name, []byte(ClusterNamePrefix))
}

// sortedLabels returns the labels of a map, sorted by name.
func sortedLabels(m map[string]string) []Label {
	var list []Label
	for _, name := range slices.Sorted(maps.Keys(m)) {
		list = append(list, Label{[]byte(name), []byte(m[name])})
	}
	return list
}

// CheckSettableLabelName returns an error if an operator must not set or remove labels with this
// name, because the name is invalid or reserved.
func CheckSettableLabelName(name string) error {
	switch {
	case name == "" || !IsLegacy([]byte("a"), []Label{{Name: []byte(name)}}):
		return fmt.Errorf("label name %q is invalid: use letters, digits and _, and do not begin with a digit", name)
	case strings.HasPrefix(name, "__") || name == ClusterLabel:
		return fmt.Errorf("label name %q is reserved: use another name", name)
	}
	return nil
}

// CheckLabel returns an error if an operator must not set this label: its name is not settable, or
// SampleList.Add would refuse every sample with this label.
func CheckLabel(name, value string) error {
	if err := CheckSettableLabelName(name); err != nil {
		return err
	}
	var l SampleList
	if err := l.Add(&RawSample{Name: []byte("a"), Labels: []Label{{[]byte(name), []byte(value)}}}); err != nil {
		return fmt.Errorf("label %q: %w", name, err)
	}
	return nil
}

// Reasons for dropping a sample, as they appear in metrics and answers. The server's reasons are
// also listed in serverDropReasons.
const (
	DropNotAllowed    = "not_allowed"    // server: the sample matches no --allow selector
	DropRequiredLabel = "required_label" // server: the sample lacks a --required-label
	DropReserved      = "reserved_name"  // client: the metric name, after renaming, is reserved for the server's own metrics
	DropNotMatched    = "not_matched"    // client: the sample matches no --match selector
	// On the client, SampleList.Add refuses the sample, or the sample alone exceeds --limit-bytes
	// or MaxPiece. On the server, a label value has a NUL byte; for any other invalid sample the
	// server refuses the whole push.
	DropInvalid = "invalid"
)

// ServerNormalizer brings samples into the form in which the server stores them; see Normalize. It
// is immutable after construction, so it is safe for concurrent use.
type ServerNormalizer struct {
	Elide    []string  // names of the labels that Normalize removes
	Labels   []Label   // the operator's labels for every sample; see ForcedLabels
	Required []Label   // labels that a sample must have, or else it is dropped; an empty value here allows any value that is not empty
	Allow    Selectors // Normalize drops a sample whose name and final labels do not match this list
}

// NormalizerUse says which rules of a ServerNormalizer matched a sample: for each label name in
// Elide, each label in Required and each selector in Allow, in the same order.
type NormalizerUse struct{ Elide, Required, Allow []bool }

// NewUse returns a NormalizerUse for n in which no rule has matched a sample.
func (n *ServerNormalizer) NewUse() NormalizerUse {
	return NormalizerUse{make([]bool, len(n.Elide)), make([]bool, len(n.Required)), make([]bool, len(n.Allow))}
}

// Clone returns a copy of u that shares no memory with it.
func (u NormalizerUse) Clone() NormalizerUse {
	return NormalizerUse{slices.Clone(u.Elide), slices.Clone(u.Required), slices.Clone(u.Allow)}
}

// ForcedLabels returns the labels that every sample of a push gets, sorted by name: the cluster ID,
// the labels of the token and the labels of the operator. If names are equal, the cluster ID has
// precedence over the token's label, and the token's label has precedence over the operator's
// label, because the token is specific to the site.
func (n *ServerNormalizer) ForcedLabels(clusterID string, tokenLabels map[string]string) []Label {
	forced := make([]Label, 0, 1+len(tokenLabels)+len(n.Labels))
	forced = append(forced, Label{[]byte(ClusterLabel), []byte(clusterID)})
	for name, value := range tokenLabels {
		if name != ClusterLabel {
			forced = append(forced, Label{[]byte(name), []byte(value)})
		}
	}
	for _, l := range n.Labels {
		if _, ofToken := tokenLabels[string(l.Name)]; !ofToken && string(l.Name) != ClusterLabel {
			forced = append(forced, l)
		}
	}
	slices.SortFunc(forced, func(a, b Label) int { return bytes.Compare(a.Name, b.Name) })
	return forced
}

// Normalize brings r into the form in which the server stores it. If the sample must be dropped,
// Normalize returns the reason. Otherwise dropReason is empty. Normalize returns an error if the
// metric name is reserved for the server's own metrics; the caller must then refuse the whole push.
//
// Normalize removes r's empty labels and r's labels in Elide. Then it adds the forced labels, which
// replace r's labels of the same name. If the label job or instance is missing, Normalize adds it
// with an empty value. A Prometheus that scrapes the server with honor_labels then does not add its
// own job and instance. So the series has the same labels whichever server of the ring the
// Prometheus scrapes.
//
// Normalize sets the rules in use that r matches; use must come from NewUse. A selector that is set
// already is evaluated only if no other selector has matched r.
func (n *ServerNormalizer) Normalize(r *RawSample, forced []Label, use *NormalizerUse) (dropReason string, err error) {
	if isReservedMetricName(r.Name) {
		return "", fmt.Errorf("the name %.100q is reserved for the server's own metrics", r.Name)
	}
	labels := r.Labels[:0]
	for _, l := range r.Labels {
		if len(l.Value) == 0 {
			continue
		}
		if i := slices.Index(n.Elide, string(l.Name)); i >= 0 {
			use.Elide[i] = true
		} else if !hasLabel(forced, l.Name) {
			labels = append(labels, l)
		}
	}
	r.Labels = append(labels, forced...)
	hasRequired := true
	for i, q := range n.Required {
		v := labelValue(r.Labels, q.Name)
		has := len(v) > 0 && (len(q.Value) == 0 || bytes.Equal(v, q.Value))
		use.Required[i] = use.Required[i] || has
		hasRequired = hasRequired && has
	}
	isAllowed := len(n.Allow) == 0
	for i := range n.Allow {
		if (!isAllowed || !use.Allow[i]) && n.Allow[i].matches(r.Name, r.Labels) {
			isAllowed, use.Allow[i] = true, true
		}
	}
	switch {
	case !hasRequired:
		return DropRequiredLabel, nil
	case !isAllowed:
		return DropNotAllowed, nil
	}
	for _, name := range [...]string{"instance", "job"} {
		if !hasLabel(r.Labels, name) {
			r.Labels = append(r.Labels, Label{Name: []byte(name)})
		}
	}
	return "", nil
}

// ClientCleaner cleans and anonymizes the samples that leave a site, and counts which of its rules
// match; see Use. It is not safe for concurrent use.
type ClientCleaner struct {
	Match           Selectors         // Clean drops a sample that does not match this list; it checks the sample before it changes it
	MatchedBySource Selectors         // selectors by which the source has selected the samples; Clean drops no sample because of them
	Rename          map[string]string // old metric name → new metric name
	Labels          []Label           // labels to add to every sample; they replace its labels of the same name
	Elide           []string          // names of the labels to remove
	Anonymize       []string          // names of the labels to anonymize; if there are any, the caller must call SetSalt before Clean
	mac             hash.Hash         // HMAC-SHA256 keyed with the salt; nil before SetSalt

	unmatched  *unmatchedSelectors // nil before prepareUse
	renamed    map[string]int      // number of renamed samples by old name
	hashed     map[string][]byte   // replacements of values of anonymized labels, by value; see hash
	anonymized []int               // number of samples with each label in Anonymize
	elided     []int               // number of samples with each label in Elide
}

// SetSalt sets the secret key of the HMAC by which Clean replaces the values of anonymized labels.
func (c *ClientCleaner) SetSalt(salt []byte) { c.mac = hmac.New(sha256.New, salt) }

// Clean renames and anonymizes r, removes its empty labels and those in Elide, and adds the labels in Labels. If the
// sample must be dropped, Clean returns the reason. Otherwise it returns "". SampleList.Add may
// still refuse the cleaned sample; the caller then drops it with the reason DropInvalid.
//
// Clean replaces the value of each label of r in Anonymize, but not of the labels in Labels, by the
// HMAC of the value, truncated to 16 bytes and base64-encoded. Clean uses an HMAC keyed with the
// salt instead of a salted hash, so that nobody can test guesses of the value without the salt.
// Under the same salt, equal values get equal replacements, even in different labels.
func (c *ClientCleaner) Clean(r *RawSample) (dropReason string) {
	if !c.Match.MatchOrEmpty(r.Name, r.Labels) {
		return DropNotMatched
	}
	c.prepareUse()
	c.unmatched.observe(r.Name, r.Labels)
	if name, ok := c.Rename[string(r.Name)]; ok {
		c.renamed[string(r.Name)]++
		r.Name = []byte(name)
	}
	if isReservedMetricName(r.Name) {
		return DropReserved
	}
	r.Labels = slices.DeleteFunc(r.Labels, func(l Label) bool {
		if len(l.Value) == 0 || hasLabel(c.Labels, l.Name) {
			return true
		}
		k := slices.Index(c.Elide, string(l.Name))
		if k >= 0 {
			c.elided[k]++
		}
		return k >= 0
	})
	for i := range r.Labels {
		l := &r.Labels[i]
		if k := slices.Index(c.Anonymize, string(l.Name)); k >= 0 {
			c.anonymized[k]++
			l.Value = c.hash(l.Value)
		}
	}
	r.Labels = append(r.Labels, c.Labels...)
	return ""
}

// A ClientCleaner remembers the replacements of at most maxHashed values of anonymized labels, each of
// at most maxHashedValue bytes. This is about 2 MB.
const (
	maxHashed      = 10_000
	maxHashedValue = 128
)

// hash returns the replacement of a value of an anonymized label. The caller must not change it. It
// remembers replacements, because most values occur in many series.
func (c *ClientCleaner) hash(value []byte) []byte {
	if replacement, ok := c.hashed[string(value)]; ok {
		return replacement
	}
	c.mac.Reset()
	c.mac.Write(value)
	replacement := base64.RawURLEncoding.AppendEncode(nil, c.mac.Sum(nil)[:16])
	if len(c.hashed) >= maxHashed {
		clear(c.hashed)
	}
	if len(value) <= maxHashedValue {
		c.hashed[string(value)] = replacement
	}
	return replacement
}

// ParseLabels parses NAME=VALUE pairs into labels sorted by name. If a name is repeated, the last
// pair with this name is used.
func ParseLabels(pairs []string) ([]Label, error) {
	m := map[string]string{}
	for _, pair := range pairs {
		name, value, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, fmt.Errorf("label %q is not NAME=VALUE", pair)
		}
		if err := CheckLabel(name, value); err != nil {
			return nil, err
		}
		m[name] = value
	}
	return sortedLabels(m), nil
}

// ParseRenames parses OLD=NEW pairs of metric names into a map from old to new names. If an old
// name is repeated, the last pair with this name is used. A last pair whose OLD equals its NEW
// cancels the earlier pairs of that name.
func ParseRenames(pairs []string) (map[string]string, error) {
	m := map[string]string{}
	for _, pair := range pairs {
		old, name, ok := strings.Cut(pair, "=")
		if !ok || old == "" || !IsLegacy([]byte(name), nil) || name == "" {
			return nil, fmt.Errorf("rename %q is not OLD=NEW with a valid metric name", pair)
		}
		m[old] = name
	}
	maps.DeleteFunc(m, func(old, name string) bool { return old == name })
	return m, nil
}
