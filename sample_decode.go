package main

// Decoding of bodies: text exposition, OpenMetrics and delimited protobuf become RawSamples,
// each handed to a callback. Only syntax is judged here, so that names and values of every
// form are held to the same rules by the sample model. This file must not know of sites,
// HTTP or compression.

import (
	"fmt"
	"mime"
	"slices"
)

// Format is a form that samples travel in.
type Format int

const (
	FormatText        Format = iota // text exposition 0.0.4, and 1.0.0 with quoted names
	FormatOpenMetrics               // OpenMetrics 1.0.0
	FormatProto                     // delimited protobuf io.prometheus.client.MetricFamily
)

// supportedFormats says to people what ParseFormat takes.
const supportedFormats = "text/plain (version 0.0.4 or 1.0.0), application/openmetrics-text (version 1.0.0), " +
	"application/vnd.google.protobuf (proto=io.prometheus.client.MetricFamily; encoding=delimited)"

// ParseFormat reads a Content-Type. None at all, and the form type that curl
// states unasked, are taken as text: content that is not fails to parse.
func ParseFormat(contentType string) (Format, error) {
	media, params, err := mime.ParseMediaType(contentType)
	if contentType == "" || err == nil && media == "application/x-www-form-urlencoded" {
		return FormatText, nil
	}
	if err == nil {
		is := func(param string, values ...string) bool {
			v, ok := params[param]
			return !ok || slices.Contains(values, v)
		}
		switch {
		case media == "text/plain" && is("version", "0.0.4", "1.0.0"):
			return FormatText, nil
		case media == "application/openmetrics-text" && is("version", "0.0.1", "1.0.0"):
			return FormatOpenMetrics, nil
		case media == "application/vnd.google.protobuf" && is("proto", "io.prometheus.client.MetricFamily") && is("encoding", "delimited"):
			return FormatProto, nil
		}
	}
	return 0, fmt.Errorf("content type %.100q is not supported; supported: %s", contentType, supportedFormats)
}

// UnsupportedParts counts what a body held and the sample model does not carry. Metadata is
// labels that say a metric's type or unit.
type UnsupportedParts struct{ Exemplars, Created, NativeHistograms, Metadata int }

// ByKind returns the counts as metrics and answers name them, zeros as well.
func (s UnsupportedParts) ByKind() map[string]int {
	return map[string]int{
		"exemplar": s.Exemplars, "created": s.Created, "native_histogram": s.NativeHistograms, "metadata_label": s.Metadata,
	}
}

// isTypeOrUnitLabel reports a label that Prometheus 3 puts on series under
// --enable-feature=type-and-unit-labels. It is reserved, and so would cost the series.
func isTypeOrUnitLabel(name []byte) bool {
	return string(name) == "__type__" || string(name) == "__unit__"
}

// Decoder decodes bodies. It keeps scratch memory between calls and is not safe
// for concurrent use. The zero value is ready.
type Decoder struct {
	parser     SeriesParser
	raw        RawSample
	name       []byte // a name with a suffix
	bound      []byte // a rendered le or quantile
	repeatable int    // bytes of names and labels that components may still repeat
	skipped    UnsupportedParts
}

// Decode calls emit for every sample of body, in its order. The first error,
// also one of emit's, ends it and is returned with the place and the series
// named. Memory used beyond body is bounded by MaxLine and MaxLabels.
func (d *Decoder) Decode(body []byte, f Format, emit func(*RawSample) error) (UnsupportedParts, error) {
	d.skipped = UnsupportedParts{}
	d.repeatable = 1<<20 + maxRepeat*len(body)
	var err error
	if f == FormatProto {
		err = d.decodeProto(body, emit)
	} else {
		err = d.decodeText(body, f == FormatOpenMetrics, emit)
	}
	return d.skipped, err
}
