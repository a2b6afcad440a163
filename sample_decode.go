package main

// This file decodes bodies of samples. It turns text exposition, OpenMetrics and delimited protobuf
// into RawSamples and passes them to a callback one by one. The decoders check only the syntax and
// some limits. SampleList.Add checks names and label values, so that the same rules apply to every
// format. This file must not know of sites, HTTP or compression.

import (
	"fmt"
	"mime"
	"slices"
)

// Format is a format of bodies with samples.
type Format int

const (
	FormatText        Format = iota // text exposition 0.0.4, and 1.0.0 with quoted names
	FormatOpenMetrics               // OpenMetrics 0.0.1 and 1.0.0
	FormatProto                     // delimited protobuf io.prometheus.client.MetricFamily
)

// supportedFormats lists content types that ParseFormat accepts, for its error message.
const supportedFormats = "text/plain (version 0.0.4 or 1.0.0), application/openmetrics-text (version 1.0.0), " +
	"application/vnd.google.protobuf (proto=io.prometheus.client.MetricFamily; encoding=delimited)"

// ParseFormat returns the format that a Content-Type header names. For any other header it returns
// an error that lists the supported formats. An empty header means text exposition. The content
// type for web forms also means text exposition, because curl sends it by default. If such a body
// is not text exposition after all, Decode fails.
func ParseFormat(contentType string) (Format, error) {
	if contentType == "" {
		return FormatText, nil
	}
	media, params, err := mime.ParseMediaType(contentType)
	if err == nil && media == "application/x-www-form-urlencoded" {
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

// UnsupportedParts counts the parts of a body that a decoder skipped because the sample model
// cannot hold them. Metadata counts the labels __type__ and __unit__, which hold the type or the
// unit of a metric.
type UnsupportedParts struct{ Exemplars, Created, NativeHistograms, Metadata int }

// ByKind returns the counts by the kind of part, including zeros. The keys are the names that
// metrics and answers use for the kinds.
func (s UnsupportedParts) ByKind() map[string]int {
	return map[string]int{
		"exemplar": s.Exemplars, "created": s.Created, "native_histogram": s.NativeHistograms, "metadata_label": s.Metadata,
	}
}

// isTypeOrUnitLabel reports whether name is a label that Prometheus 3 adds to series with
// --enable-feature=type-and-unit-labels. The decoders remove these labels. Their names are
// reserved, so SampleList.Add would otherwise reject the series.
func isTypeOrUnitLabel(name []byte) bool {
	return string(name) == "__type__" || string(name) == "__unit__"
}

// Decoder decodes bodies. It keeps scratch memory between calls, so it is not safe for concurrent
// use. The zero value is ready for use.
type Decoder struct {
	parser     SeriesParser
	raw        RawSample // the sample that the decoder passes to the callback emit
	name       []byte    // scratch: a metric name with a suffix, such as _bucket
	bound      []byte    // scratch: the rendered value of an le or quantile label
	repeatable int64     // bytes of names and labels that histograms and summaries may still repeat in this body; see maxRepeat
	skipped    UnsupportedParts
	known      *KnownPush // nil if no series is known or can become known

	// The next fields are about the parts of the body that are decoded so far; see DecodeFrom.
	units   int    // lines of text, or families of protobuf
	created []byte // name of the _created samples of the OpenMetrics family that the last line belongs to; empty if it has none
	ended   bool   // the line # EOF of OpenMetrics was decoded
}

// Decode calls emit for the samples of body, in the order of the body. It skips the parts that
// UnsupportedParts counts. It stops at the first error, including an error from emit, and returns
// the error. The error gives the number of the line (of text) or of the family (of protobuf), and
// the series, if they are known. Decode returns the counts of the skipped parts even after an
// error. Memory used beyond body is bounded by MaxLine and MaxLabels.
func (d *Decoder) Decode(body []byte, f Format, emit func(*RawSample) error) (UnsupportedParts, error) {
	return d.DecodeKnown(body, f, nil, emit)
}

// DecodeKnown decodes as Decode does, but it calls emit only for the samples whose series are not
// known, or whose form is not the plain one. It adds the samples of known series to the list of p,
// or counts them as dropped. emit must add the samples to the same list, and set their DropCode if
// it drops them. If the error is ErrDecodeAgain, the caller must decode the body with Decode.
func (d *Decoder) DecodeKnown(body []byte, f Format, p *KnownPush, emit func(*RawSample) error) (UnsupportedParts, error) {
	d.begin(len(body))
	if p != nil && p.known != nil {
		d.known = p
	}
	err := d.decodePart(body, f, true, emit)
	return d.skipped, err
}

// begin prepares d for a new body of at most limit bytes, without known series.
func (d *Decoder) begin(limit int) {
	d.known, d.raw.DropCode = nil, 0
	d.skipped, d.repeatable = UnsupportedParts{}, 1<<20+maxRepeat*int64(limit)
	d.units, d.created, d.ended = 0, d.created[:0], false
}

// decodePart decodes the next part of a body. Every part but the last one ends where a line of text
// or a family of protobuf ends.
func (d *Decoder) decodePart(part []byte, f Format, isLast bool, emit func(*RawSample) error) error {
	if f == FormatProto {
		return d.decodeProto(part, emit)
	}
	return d.decodeText(part, f == FormatOpenMetrics, isLast, emit)
}

// learn calls decode, which decodes a sample of a series that is not known, and notes what became of
// the sample. Parts of the sample that were skipped are counted for each sample, so a series with
// such parts cannot become known.
func (d *Decoder) learn(h formHash, decode func() error) error {
	d.raw.DropCode = 0
	skipped, samples := d.skipped, len(d.known.list.Samples)
	if err := decode(); err != nil {
		return err
	}
	if d.skipped == skipped {
		d.known.noteDecoded(h, d.raw.DropCode, samples)
	}
	return nil
}
