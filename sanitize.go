package main

// This file cleans samples on the client and normalizes them on the server. After
// ServerNormalizer.Normalize, a sample has the authenticated cluster ID as a label, and its name is
// not one that the server itself serves. After ClientCleaner.Clean, no label in Anonymize has its
// original value. This family must not know of HTTP, files or stores. It keeps no state between
// samples.

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

// Names and name prefix of the metrics that the server itself serves about each site. A push must
// not contain them. Otherwise a site could hide from alerts that it no longer pushes, and a scrape
// could contain a series twice.
const (
	PushTimeName        = "push_time_seconds"
	PushFailureTimeName = "push_failure_time_seconds"
	ClusterNamePrefix   = "telemeter_cluster_"
)

// isReservedMetricName reports whether name is a name that the server itself serves. It also
// reports true for a name that becomes such a name by escaping with underscores.
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
// name.
func CheckSettableLabelName(name string) error {
	switch {
	case name == "" || !IsLegacy([]byte("a"), []Label{{Name: []byte(name)}}):
		return fmt.Errorf("label name %q is invalid: use letters, digits and _, and do not begin with a digit", name)
	case strings.HasPrefix(name, "__") || name == ClusterLabel:
		return fmt.Errorf("label name %q is reserved", name)
	}
	return nil
}

// CheckLabel returns an error if an operator must not set this label, because SampleList.Add would
// refuse every sample that has it.
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
	DropNotAllowed    = "not_allowed"    // server: no --allow selector matches the sample
	DropRequiredLabel = "required_label" // server: the sample lacks a --required-label
	DropReserved      = "reserved_name"  // client: the server itself serves this metric name
	DropNotMatched    = "not_matched"    // client: no --match selector matches the sample
	DropInvalid       = "invalid"        // server and client: SampleList.Add refuses the sample
)

// ServerNormalizer brings samples into the server's normal form. It is immutable after
// construction, so it is safe for concurrent use.
type ServerNormalizer struct {
	Elide    []string  // names of the labels to remove
	Labels   []Label   // the operator's labels, added to every sample
	Required []Label   // labels that every sample must have; an empty value here allows any value
	Allow    Selectors // every sample must match this list after normalization
}

// ForcedLabels returns the labels that every sample of a push gets, sorted by name: the cluster
// ID, the labels of the token and the labels of the operator. If names are equal, the cluster ID
// replaces the token's label, and the token's label replaces the operator's, because the token is
// specific to the site.
func (n *ServerNormalizer) ForcedLabels(clusterID string, tokenLabels map[string]string) []Label {
	m := map[string]string{}
	for _, l := range n.Labels {
		m[string(l.Name)] = string(l.Value)
	}
	maps.Copy(m, tokenLabels)
	m[ClusterLabel] = clusterID
	return sortedLabels(m)
}

// Normalize brings r into normal form. If the sample must be dropped, Normalize returns the reason.
// Otherwise dropReason is empty. After an error, the whole push must be refused.
//
// Normalize removes empty labels and the labels in Elide. The forced labels replace r's labels of
// the same name. If job or instance is missing, Normalize adds it with an empty value. A Prometheus
// that scrapes with honor_labels then does not add its own job and instance, so the series has the
// same identity whichever server it is scraped from.
func (n *ServerNormalizer) Normalize(r *RawSample, forced []Label) (dropReason string, err error) {
	if isReservedMetricName(r.Name) {
		return "", fmt.Errorf("the name %.100q is reserved for the server's own metrics", r.Name)
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
	Match     Selectors         // every sample must match this list, as it was scraped
	Rename    map[string]string // old metric name → new metric name
	Labels    []Label           // added to every sample
	Anonymize []string          // names of the labels to anonymize; SetSalt must be called before Clean
	mac       hash.Hash         // HMAC-SHA256 keyed with the salt
}

// SetSalt sets the key for anonymized values.
func (c *ClientCleaner) SetSalt(salt []byte) { c.mac = hmac.New(sha256.New, salt) }

// Clean cleans r. If the sample must be dropped, Clean returns the reason. Otherwise it returns "".
// SampleList.Add may still refuse the cleaned sample, with the reason DropInvalid.
//
// Clean replaces each value to anonymize by its HMAC, truncated to 16 bytes and base64-encoded. An
// HMAC is used instead of a salted hash, so that nobody can test guesses without the salt. Equal
// values get equal replacements, even under different labels.
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

// ParseLabels parses NAME=VALUE pairs into labels sorted by name. If a name is repeated, the last
// pair is used.
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

// ParseRenames parses OLD=NEW pairs of metric names. If an old name is repeated, the last pair is
// used. A pair with OLD equal to NEW cancels earlier pairs for that name.
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
