package main

// The client's cleanup and anonymization, and the server's normal form. After the server's
// ServerNormalizer a sample carries the authenticated cluster ID and no name that the server itself
// serves. After the client's ClientCleaner no anonymized label holds its value. This family must not
// know of HTTP, files or stores, and keeps no state between samples.

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

// labelValue returns the value of a label, empty if there is none: to Prometheus
// an empty label and a missing one are the same.
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

// Names that the server adds for each site. A push must not have them, or a
// site could deny its own silence, and a scrape hold one series twice.
const (
	PushTimeName        = "push_time_seconds"
	PushFailureTimeName = "push_failure_time_seconds"
	ClusterNamePrefix   = "telemeter_cluster_"
)

// isReservedMetricName reports a metric name that is shown to some scraper as one of those.
func isReservedMetricName(name []byte) bool {
	if !IsLegacy(name, nil) { // push.time.seconds is shown as push_time_seconds
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

// CheckSettableLabelName reports the name of a label that an operator must not set or remove.
func CheckSettableLabelName(name string) error {
	switch {
	case name == "" || !IsLegacy([]byte("a"), []Label{{Name: []byte(name)}}):
		return fmt.Errorf("label name %q: use letters, digits and _, not a digit first", name)
	case strings.HasPrefix(name, "__") || name == ClusterLabel:
		return fmt.Errorf("label name %q is reserved", name)
	}
	return nil
}

// CheckLabel reports a label that an operator must not set: every sample with it
// would be refused.
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

// Reasons for which a sample is dropped, as metrics and answers name them. Those of the server
// are also in serverDropReasons.
const (
	DropNotAllowed    = "not_allowed"    // by the server: --allow does not choose it
	DropRequiredLabel = "required_label" // by the server: it lacks a --required-label
	DropReserved      = "reserved_name"  // by the client
	DropNotMatched    = "not_matched"    // by the client: --match does not choose it
	DropInvalid       = "invalid"        // by either: SampleList.Add refuses it
)

// ServerNormalizer brings samples into the server's normal form. It is immutable and
// safe for concurrent use.
type ServerNormalizer struct {
	Elide    []string  // labels to remove
	Labels   []Label   // the operator's
	Required []Label   // a sample without one is dropped; an empty value stands for any
	Allow    Selectors // a sample that they do not choose, in normal form, is dropped
}

// ForcedLabels returns the labels that every sample of a push gets: the cluster ID, the
// token's, and the operator's. Of two with one name the cluster ID wins over the token's label,
// which wins over the operator's, because a token says more of the site.
func (n *ServerNormalizer) ForcedLabels(clusterID string, tokenLabels map[string]string) []Label {
	m := map[string]string{}
	for _, l := range n.Labels {
		m[string(l.Name)] = string(l.Value)
	}
	maps.Copy(m, tokenLabels)
	m[ClusterLabel] = clusterID
	return sortedLabels(m)
}

// Normalize brings r into normal form. It returns the reason for which the sample is to be
// dropped, or "". An error refuses the whole push. The forced labels replace r's own, and job
// and instance are added empty where they are missing: under honor_labels a series then keeps
// its identity whichever server exposes it.
func (n *ServerNormalizer) Normalize(r *RawSample, forced []Label) (dropReason string, err error) {
	if isReservedMetricName(r.Name) {
		return "", fmt.Errorf("the name %.100q is reserved for what the server itself serves", r.Name)
	}
	labels := r.Labels[:0]
	for _, l := range r.Labels {
		if len(l.Value) > 0 && !slices.Contains(n.Elide, string(l.Name)) && !hasLabel(forced, l.Name) {
			labels = append(labels, l)
		}
	}
	r.Labels = append(labels, forced...)
	for _, q := range n.Required {
		if v := labelValue(r.Labels, q.Name); len(v) == 0 || len(q.Value) > 0 && !bytes.Equal(v, q.Value) {
			return DropRequiredLabel, nil
		}
	}
	if !n.Allow.MatchOrEmpty(r.Name, r.Labels) {
		return DropNotAllowed, nil
	}
	for _, name := range [...]string{"instance", "job"} {
		if !hasLabel(r.Labels, name) {
			r.Labels = append(r.Labels, Label{Name: []byte(name)})
		}
	}
	return "", nil
}

// ClientCleaner cleans and anonymizes the samples that leave a site. It is not safe for
// concurrent use.
type ClientCleaner struct {
	Match     Selectors         // a sample that they do not choose, as scraped, is dropped
	Rename    map[string]string // metric names, old to new
	Labels    []Label           // put on every sample
	Anonymize []string          // labels whose values are replaced; they need a salt
	mac       hash.Hash         // HMAC-SHA256 under the salt
}

// SetSalt sets the key under which values are anonymized.
func (c *ClientCleaner) SetSalt(salt []byte) { c.mac = hmac.New(sha256.New, salt) }

// Clean cleans r. It returns the reason for which the sample is to be dropped, or "".
// SampleList.Add may still refuse r, as DropInvalid. Anonymized values are an HMAC and
// not a salted hash, so that without the salt nobody can try guesses; equal
// values stay equal, under every label.
func (c *ClientCleaner) Clean(r *RawSample) (dropReason string) {
	if !c.Match.MatchOrEmpty(r.Name, r.Labels) {
		return DropNotMatched
	}
	if name, ok := c.Rename[string(r.Name)]; ok {
		r.Name = []byte(name)
	}
	if isReservedMetricName(r.Name) {
		return DropReserved
	}
	r.Labels = slices.DeleteFunc(r.Labels, func(l Label) bool {
		return len(l.Value) == 0 || hasLabel(c.Labels, l.Name)
	})
	for i := range r.Labels {
		if l := &r.Labels[i]; slices.Contains(c.Anonymize, string(l.Name)) {
			c.mac.Reset()
			c.mac.Write(l.Value)
			l.Value = base64.RawURLEncoding.AppendEncode(nil, c.mac.Sum(nil)[:16])
		}
	}
	r.Labels = append(r.Labels, c.Labels...)
	return ""
}

// ParseLabels parses NAME=VALUE pairs, later ones winning.
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

// ParseRenames parses OLD=NEW pairs of metric names, later ones winning.
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
