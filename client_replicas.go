package main

// This file finds the external labels that tell replicas apart. If such a label is not removed, all
// series are doubled at the first change of the source.

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// DescribeReplicas says in a sentence which labels differ between the external labels of replicas and
// are not in elide. It returns "" if none does.
func DescribeReplicas(external []map[string]string, elide []string) string {
	differ := map[string]bool{}
	for _, labels := range external {
		for _, m := range []map[string]string{labels, external[0]} {
			for name := range m {
				if labels[name] != external[0][name] && !slices.Contains(elide, name) {
					differ[name] = true
				}
			}
		}
	}
	if len(differ) == 0 {
		return ""
	}
	names := slices.Sorted(maps.Keys(differ))
	return fmt.Sprintf("the replicas differ in the external label %s, so that consumers would see each series once for each replica: add --elide-label %s",
		strings.Join(names, ", "), strings.Join(names, " --elide-label "))
}

// compareReplicas asks all sources for their external labels once, and logs which ones differ. A source
// that does not answer is not compared.
func (c *Client) compareReplicas(ctx context.Context) {
	var external []map[string]string
	for _, src := range c.sources.all {
		api := sourceAPI{c, src, c.state.Load()}
		selectors, err := api.selectors()
		if err != nil {
			return
		}
		if labels, err := api.externalLabels(ctx, selectors, c.moment().Wall+src.skew.Load()); err == nil {
			external = append(external, labels)
		}
	}
	if text := DescribeReplicas(external, c.state.Load().NewCleaner().Elide); text != "" {
		c.cfg.Log.Warn(text)
		c.differing.Store(&text)
	}
}

// replicasDiffer returns what compareReplicas logged.
func (c *Client) replicasDiffer() string {
	if text := c.differing.Load(); text != nil {
		return *text
	}
	return ""
}
