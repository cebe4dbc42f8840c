{{- define "chunkflow.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "chunkflow.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "chunkflow.airflowNamespace" -}}
{{- default .Release.Namespace .Values.airflow.namespace -}}
{{- end -}}

{{- define "chunkflow.serviceAccount" -}}
{{- if .Values.serviceAccount.name -}}
{{- .Values.serviceAccount.name -}}
{{- else if .Values.serviceAccount.create -}}
{{- include "chunkflow.fullname" . -}}
{{- else -}}
default
{{- end -}}
{{- end -}}

{{- /* Whose server of tokens pods may ask: gke, eks, or none. */ -}}
{{- define "chunkflow.identity" -}}
{{- if ne .Values.networkPolicy.identity "auto" -}}
{{- .Values.networkPolicy.identity -}}
{{- else if hasKey .Values.serviceAccount.annotations "iam.gke.io/gcp-service-account" -}}
gke
{{- else -}}
none
{{- end -}}
{{- end -}}

{{- define "chunkflow.image" -}}
{{- printf "%s:%s" .Values.image.repository (default (printf "%s-cpu" .Chart.AppVersion) .Values.image.tag) -}}
{{- end -}}

{{- /* Name of the Secret with credentials; empty if there is none. */ -}}
{{- define "chunkflow.credentials" -}}
{{- if and .Values.credentials.existingSecret .Values.credentials.files -}}
{{- fail "credentials: give existingSecret or files, not both" -}}
{{- else if .Values.credentials.existingSecret -}}
{{- .Values.credentials.existingSecret -}}
{{- else if .Values.credentials.files -}}
{{- include "chunkflow.fullname" . -}}-credentials
{{- end -}}
{{- end -}}

{{- /* Name of the claim; empty if there is none. */ -}}
{{- define "chunkflow.claim" -}}
{{- if and .Values.claim.existingClaim .Values.claim.create -}}
{{- fail "claim: give existingClaim or create: true, not both" -}}
{{- else if .Values.claim.existingClaim -}}
{{- .Values.claim.existingClaim -}}
{{- else if .Values.claim.create -}}
{{- include "chunkflow.fullname" . -}}-data
{{- end -}}
{{- end -}}

{{- /* The runner section of a spec that fits this release. */ -}}
{{- define "chunkflow.runner" -}}
kind: kubernetes
image: {{ include "chunkflow.image" . }}
namespace: {{ .Release.Namespace }}
service_account: {{ include "chunkflow.serviceAccount" . }}
{{- if and .Values.imagePullSecrets (not .Values.serviceAccount.create) }}
image_pull_secrets: {{ .Values.imagePullSecrets | toJson }}
{{- end }}
infer: {cpu: 4, memory: 16Gi, gpu: 1{{ if .Values.priorityClasses.create }}, priority_class: {{ include "chunkflow.fullname" . }}-infer{{ end }}}
blend: {cpu: 1, memory: 2Gi{{ if .Values.priorityClasses.create }}, priority_class: {{ include "chunkflow.fullname" . }}-blend{{ end }}}
{{- $credentials := include "chunkflow.credentials" . }}
{{- $claim := include "chunkflow.claim" . }}
{{- if or $credentials $claim }}
volumes:
{{- if $credentials }}
  - {secret: {{ $credentials }}, mount: /tmp/.cloudvolume/secrets, read_only: true}
{{- end }}
{{- if $claim }}
  - {claim: {{ $claim }}, mount: {{ .Values.claim.mount }}}
{{- end }}
{{- end }}
{{- if $claim }}
fs_group: 1000
{{- end }}
{{- end -}}
