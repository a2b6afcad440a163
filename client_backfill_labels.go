package main

// This file learns the external labels of the source. /federate adds them to each series that has no
// label of the same name (web/federate.go in the source of Prometheus), and the query API does not.
// The labels are learned by comparing the same series in both answers.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
)

const (
	// maxProbes bounds the series that are compared. A series can hide an external label behind its
	// own label of the same name, so series with different label names are compared.
	maxProbes      = 16
	maxProbeAnswer = 1 << 20 // bytes of an answer of /federate with one series

	metricNameLabel = "__name__" // label of the metric name in answers of the query API
)

// externalLabels returns the labels that /federate of the source adds to series. It compares series up,
// which every Prometheus that scrapes has, and, if there are none, series that the selectors match. now
// is the time of the source's clock.
func (a sourceAPI) externalLabels(ctx context.Context, selectors Selectors, now int64) (map[string]string, error) {
	up, _ := ParseSelectors([]string{"up"})
	for _, s := range []Selectors{up, selectors} {
		probes, err := a.findProbes(ctx, s, now)
		if err != nil {
			return nil, err
		}
		external, compared := map[string]string{}, 0
		for _, probe := range probes {
			added, err := a.labelsAddedTo(ctx, probe, now)
			if err != nil {
				return nil, fmt.Errorf("comparing /federate and the query API: %w", err)
			}
			if added != nil {
				compared++
				maps.Copy(external, added)
			}
		}
		if compared > 0 {
			return external, nil
		}
	}
	return nil, errors.New("no series is in the answers of both /federate and the query API, so it is not known which labels /federate adds")
}

// findProbes returns series with different sets of label names, those with the fewest labels first.
func (a sourceAPI) findProbes(ctx context.Context, selectors Selectors, now int64) ([]map[string]string, error) {
	byNames := map[string]map[string]string{}
	for _, m := range selectors {
		err := a.query(ctx, m.String(), now, func(s *apiSeries) error {
			names := strings.Join(slices.Sorted(maps.Keys(s.Labels)), ",")
			if _, known := byNames[names]; !known && len(byNames) < 64*maxProbes && isLegacyProbe(s.Labels) {
				byNames[names] = s.Labels
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	probes := slices.SortedFunc(maps.Values(byNames), func(a, b map[string]string) int {
		return cmp.Or(cmp.Compare(len(a), len(b)), strings.Compare(a[metricNameLabel], b[metricNameLabel]))
	})
	return probes[:min(len(probes), maxProbes)], nil
}

// labelsAddedTo returns the labels that /federate adds to the series with the given labels. It returns
// nil if the source has other series that have these labels and more, or if the series has ended.
func (a sourceAPI) labelsAddedTo(ctx context.Context, labels map[string]string, now int64) (map[string]string, error) {
	selector := exactSelector(labels)
	n := 0
	if err := a.query(ctx, selector, now, func(*apiSeries) error { n++; return nil }); err != nil || n != 1 {
		return nil, err
	}
	var found []map[string]string
	u := *a.src.url
	q := u.Query()
	q.Set("match[]", selector)
	u.RawQuery = q.Encode()
	err := a.get(ctx, &u, scrapeAccept, func(resp *http.Response) error {
		if err := checkSourceAnswer(resp); err != nil {
			return err
		}
		format, err := ParseFormat(resp.Header.Get("Content-Type"))
		if err != nil {
			return err
		}
		_, err = new(Decoder).DecodeFrom(&sourceBody{r: resp.Body, limit: maxProbeAnswer}, maxProbeAnswer, format, func(r *RawSample) error {
			series := map[string]string{metricNameLabel: string(r.Name)}
			for _, l := range r.Labels {
				series[string(l.Name)] = string(l.Value)
			}
			found = append(found, series)
			return nil
		})
		return err
	})
	if err != nil || len(found) != 1 {
		return nil, err
	}
	maps.DeleteFunc(found[0], func(name, value string) bool { return value == "" || labels[name] == value })
	return found[0], nil
}

// exactSelector returns a selector that matches series with the given labels, and others that have
// more labels.
func exactSelector(labels map[string]string) string {
	var matchers []string
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		matchers = append(matchers, name+"="+strconv.Quote(labels[name]))
	}
	return "{" + strings.Join(matchers, ",") + "}"
}

// isLegacyProbe reports whether a selector of any version of Prometheus can name the labels.
func isLegacyProbe(labels map[string]string) bool {
	for name := range labels {
		if !IsLegacy([]byte("a"), []Label{{Name: []byte(name)}}) {
			return false
		}
	}
	return labels[metricNameLabel] != ""
}
